"""Run networks on images: from files to numbers, in one process or several."""
