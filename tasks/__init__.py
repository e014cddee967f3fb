"""The stages: files in, one library call, files and a card out."""
