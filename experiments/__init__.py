"""One directory per run; `make.py` writes the params.json of every run that was not published, from `recipes`."""
