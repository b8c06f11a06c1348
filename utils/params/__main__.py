"""`python -m utils.params`, the command that the documentation names: runs/parameters.py, which knows the stages."""
import runpy

if __name__ == "__main__":
    runpy.run_module("runs.parameters", run_name="__main__", alter_sys=True)
