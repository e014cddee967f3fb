"""The stages: files in, one library call, files and a card out."""

from tasks.warm import hand_over

hand_over()  # before this process imports anything, if it was started as a stage
