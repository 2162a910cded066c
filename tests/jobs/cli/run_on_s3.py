"""Runs jobs one after the other in one process: `run_on_s3.py JOB... -- OPTION...`, for test_run_on_s3.

A job is a verb and, after a comma, its target, as in verify_table,s3://bucket/run/latents. After `in-process`
only trainings start Ray.
"""

import importlib
import sys

from in_process import in_process

from jobs.runtime.exit_codes import exit_process

if __name__ == "__main__":
    words = sys.argv[1:]
    in_this_process = words[0] == "in-process"
    for job in words[in_this_process : words.index("--")]:
        verb, *target = job.split(",")
        module = importlib.import_module(f"jobs.{verb}")
        if in_this_process and hasattr(module, "runner"):
            module.runner = lambda *_, **__: in_process
        if code := module.main([*target, *words[words.index("--") + 1 :]]):
            exit_process(code)
    exit_process(0)
