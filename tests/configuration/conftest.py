"""Makes `gin_samples`, the classes that these tests configure, importable by gin files."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
