"""Tests that the documents' commands and facts are right."""
