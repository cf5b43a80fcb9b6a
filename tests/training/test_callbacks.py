import csv

import pytest

from zoo.training.callbacks import ResumingCSVLogger


@pytest.mark.parametrize("written", [2, 3, 5])
def test_rows_go_on_where_a_run_does(tmp_path, written):
    """A run that was killed after the checkpoint of step 3, before or after it logged that step and later ones."""
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,val/psnr\n" + "".join(f"{n},0.{n},\n" for n in range(written))
    )
    logger = ResumingCSVLogger(tmp_path)
    logger.continue_from(3, {"train/loss": 0.2})
    with (tmp_path / "metrics.csv").open() as file:
        assert [(row["step"], row["train/loss"]) for row in csv.DictReader(file)] == [
            ("0", "0.0"),
            ("1", "0.1"),
            ("2", "0.2"),
        ]
