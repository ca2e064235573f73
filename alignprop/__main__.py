"""Runs the command `alignprop` for `python -m alignprop …` and `accelerate launch -m alignprop …`."""

from alignprop.command import main

main()
