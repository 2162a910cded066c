"""What a finished pipeline prints: only commands that can be carried out."""

from jobs.cli.job import Job
from jobs.cli.usage import usage_lines
from jobs.recipes.registry import recipe_named


def test_a_bundle_with_page_is_served(tmp_path):
    job = Job(verb="run_pipeline", recipe=recipe_named("mini"), out=str(tmp_path))
    command = f"snapfusion serve --bundle {tmp_path}/mobile"
    assert command not in "\n".join(usage_lines(job))
    (tmp_path / "mobile/web").mkdir(parents=True)
    (tmp_path / "mobile/web/index.html").touch()
    assert command in "\n".join(usage_lines(job))


def test_the_student_is_compared_with_its_teacher(tmp_path):
    job = Job(verb="run_pipeline", recipe=recipe_named("mini"), out=str(tmp_path))
    words = f"snapfusion serve mini {tmp_path}/student --bundle {tmp_path}/mobile "
    assert words in "\n".join(usage_lines(job))
