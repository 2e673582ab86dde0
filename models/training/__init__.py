"""The paper's recipe and the loop that runs it."""
