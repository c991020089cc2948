"""Settings of nbgrader for this course; its commands read them when they are run in this folder."""

import os
import sys
import warnings
from pathlib import Path

from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, OverwriteCells, OverwriteKernelspec

from selfrepair.course.submissions import RestoreCells

HERE = Path(__file__).resolve().parent
config = get_config()  # noqa: F821 - nbgrader defines it

config.CourseDirectory.root = str(HERE)
config.CourseDirectory.course_id = "self-repair"

# An endless loop is interrupted after this many seconds; the cells after it still run.
config.Execute.timeout = 120
config.Execute.interrupt_on_timeout = True

# Copied, deleted and nameless cells of students are put in order before they are graded.
config.Autograde.sanitize_preprocessors = [
    ClearOutput,
    RestoreCells,
    OverwriteKernelspec,
    OverwriteCells,
    CheckCellMetadata,
]

# nbgrader's own database code makes its database library warn at every student.
warnings.filterwarnings("ignore", module=r"nbgrader\.api")

# A warning is no mistake: without this, nbgrader would give the test cell that shows it no points.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
# Models and texts are in the repository: no student's code needs the hub while it is graded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels use the environment and the library that nbgrader itself runs in.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent / "shared"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
