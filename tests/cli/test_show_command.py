"""`fim-lora show`."""

from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, error_line, files


def test_show_prints_the_table_and_draws_the_map_again(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert allocate(llama, data, out) == 0
    printed = capsys.readouterr().out
    picture = (out / "rank_map.png").read_bytes()
    (out / "rank_map.png").unlink()
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert printed.split("Ranks in", 1)[1] == shown.split("Ranks in", 1)[1]
    assert (out / "rank_map.png").read_bytes() == picture
    assert files(out) == OUR_FILES


def test_show_refuses_what_is_no_allocation(tmp_path, capsys):
    assert main(["show", str(tmp_path / "nope")]) == 1
    assert "fim_allocation.json: no such file. Give the folder that" in error_line(capsys)
    (tmp_path / "fim_allocation.json").write_text("{}")
    assert main(["show", str(tmp_path)]) == 1
    assert "is not a fim_allocation file" in error_line(capsys)


def test_show_reads_a_folder_for_servers(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "plain") == 0
    assert allocate(llama, data, tmp_path / "serving", "--serving") == 0
    capsys.readouterr()
    shown = []
    for name in ("plain", "serving"):
        assert main(["show", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
