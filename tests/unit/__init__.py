"""Tests of single modules, in this process."""
