"""`python -m alignprop …` and `accelerate launch -m alignprop …` are the command `alignprop`."""

from alignprop.command import main

main()
