"""Tests of the command line, as a person types it."""
