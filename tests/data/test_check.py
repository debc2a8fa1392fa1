"""``diffalign data check``."""

import json

import pytest

from diffalign.cli import main
from diffalign.data.check import CheckConfig, check, run
from diffalign.data.pairs import PairDataset
from diffalign.errors import UserError


@pytest.fixture
def mixed(make, tmp_path):
    """Ten rows: seven usable, of which one repeats and one contradicts another; a tie; two damaged."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"p{i}",
            "chosen": make.encoded(make.picture(i)),
            "rejected": make.encoded(make.picture(20 + i)),
        }
        for i in range(10)
    ]
    rows[3]["preference"] = 0.5
    rows[4]["chosen"] = b"broken"
    rows[5]["prompt"] = ""
    rows[6] |= {key: rows[0][key] for key in ("id", "prompt", "chosen", "rejected")}
    rows[7] |= {"prompt": "p1", "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    rows[8]["rejected"] = make.encoded(make.picture(99, (40, 24)))
    return make.jsonl_folder(tmp_path / "mixed", rows)


def test_findings(mixed, tmp_path, capsys):
    findings = run(
        CheckConfig(str(mixed), resolution=20, max_bad=0.5, report=str(tmp_path / "new/report.json"))
    )
    assert (findings.rows, findings.pairs, findings.prompts) == (10, 7, 5)
    assert (findings.ties, findings.damaged) == (1, 2)
    assert findings.reasons == {"tie": 1, "unreadable image": 1, "empty caption": 1}
    assert (findings.repeated, findings.contradicted, findings.repeated_ids) == (1, 1, 1)
    assert (findings.unequal_sizes, findings.below_resolution, findings.shortest_side) == (1, 13, 16)
    text = capsys.readouterr().out
    assert "10 rows, 7 usable pairs, 5 prompts" in text
    assert "r4" in text
    assert text.endswith("usable\n")
    report = json.loads((tmp_path / "new/report.json").read_text())
    assert report["left_out"][1] == {"row": 4, "id": "r4", "reason": "unreadable image"}
    assert report["damaged_share"] == pytest.approx(2 / 9)


def test_command_line_exit_codes(mixed, make, tmp_path, capsys):
    command = ["data", "check", "--dataset", str(mixed), "--show", "1", "--report", str(tmp_path / "r.json")]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "... and 2 more" in out
    assert "22.2% of the rows" in err
    assert (tmp_path / "r.json").is_file()  # written before the refusal
    assert main([*command, "--max_bad", "0.3"]) == 0
    assert main(["data", "check", "--dataset", str(mixed), "--columns", "{chosen: winner}"]) == 2
    assert "no column 'winner'" in capsys.readouterr().err
    broken = [{"prompt": "a", "chosen": b"x", "rejected": b"y"}]
    assert main(["data", "check", "--dataset", str(make.jsonl_folder(tmp_path / "none", broken))]) == 2
    assert "no usable pair" in capsys.readouterr().err


def test_a_clean_set(make, capsys):
    findings = check(make.lists(5), progress=False)
    assert (findings.rows, findings.pairs, findings.damaged_share, findings.left_out) == (5, 5, 0, [])
    assert findings.below_resolution is None
    assert capsys.readouterr() == ("", "")


def test_all_images_bad(make):
    dataset = PairDataset.from_lists(["a"], [b"x"], [b"y"], max_bad=1)
    assert check(dataset).pairs == 0
    with pytest.raises(UserError, match="no usable pair in the lists: 1 unreadable image"):
        dataset[0]
