"""The report of a run: report.html, one page that shows whether the pictures got better or only scored higher.

source.py      what the page is made from: the files of a run or of an evaluation
verdict.py     the words, from paired differences
charts.py      the curves
page.py        the page of a run, and the page that compares several
film.py        pictures of the same prompts and noise at every evaluation, as MP4, GIF or WebP
"""
