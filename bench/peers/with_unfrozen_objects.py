"""serve/run.py whose garbage collections visit what was loaded at the start as well."""

import gc
import runpy
from pathlib import Path

gc.freeze = lambda: None
runpy.run_path(str(Path(__file__).parents[2] / "serve" / "run.py"), run_name="__main__")
