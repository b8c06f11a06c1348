"""One directory per run; `make.py` writes the params.json of every unpublished run from `recipes`."""
