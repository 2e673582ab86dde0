"""Recorder as a callback of other packages' trainers; import the module of the one you use."""
