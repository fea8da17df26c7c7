"""Gin files and flags to what a command is called with; gin's only room."""
