"""Tests of whole runs, in this process: training, resuming, evaluating, exporting, forecasts beside real steps."""
