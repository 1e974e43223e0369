"""Runs nvcc, and fails where ptxas serialises the products of warp groups, which it merely notes.

ptxas reports C75xx as information, and the kernel stays right but loses the overlap that it is
written for. CMake calls this in the place of nvcc, so that what was noted is not built.
"""

import re
import subprocess
import sys

result = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print(result.stdout, end="")
note = re.search(r"\(C75\d\d\).*", result.stdout)
if note and result.returncode == 0:
    sys.exit(f"ptxas error: {note[0]}")
sys.exit(result.returncode)
