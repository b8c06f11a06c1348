"""`python -m utils.params` runs runs/parameters.py, which imports the stages."""
import runpy

if __name__ == "__main__":
    runpy.run_module("runs.parameters", run_name="__main__", alter_sys=True)
