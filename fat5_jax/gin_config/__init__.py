"""What a command line and gin files say, in the words of this library."""
