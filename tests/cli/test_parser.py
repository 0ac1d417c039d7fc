"""Properties of every verb: spelling of options, option files, results as JSON, and errors as one line."""

import json
import os

import pytest
import typer
import yaml

from hf_kd_ranking.cli import app, main
from hf_kd_ranking.cli.parser import add_verb, exit_on_bad_input, make_app, run_app
from hf_kd_ranking.errors import InputError, UnknownIdError

TREE = typer.main.get_command(app)
VERBS = {name: command for name, command in TREE.commands.items() if name != "teacher"}
VERBS |= {f"teacher {name}": command for name, command in TREE.commands["teacher"].commands.items()}
VALUE = "3"  # a number, a word and a path


@pytest.fixture
def parse(monkeypatch):
    """parse("verb", "--option", "value"): the parameters that the verb would be called with, none of which is read."""
    monkeypatch.setattr("hf_kd_ranking.retrieval.bm25.check_language", lambda language: None)  # read while parsing

    def run(verb: str, *arguments: str) -> dict:
        recorded = {}
        monkeypatch.setattr(VERBS[verb], "callback", lambda **values: recorded.update(values))
        monkeypatch.setattr(typer.main, "get_command", lambda app: TREE)
        run_app(app, [*verb.split(), *map(str, arguments)], "hf-kd-ranking")
        recorded.pop("config")
        return recorded

    return run


def options(verb: str) -> list:
    return [option for option in VERBS[verb].params if option.param_type_name == "option" and option.name != "config"]


def arguments(verb: str, spell=str) -> list[str]:
    """Return a value for every option and argument of a verb; every second flag is off."""
    result = []
    for parameter in VERBS[verb].params:
        if parameter.param_type_name == "argument":
            result.append(VALUE)
    flags = 0
    for option in options(verb):
        if option.is_flag:
            flags += 1
            result.append(spell((option.opts if flags % 2 else option.secondary_opts)[0]))
        else:
            result += [spell(option.opts[-1]), *[VALUE] * option.nargs]
    return result


def with_underscores(name: str) -> str:
    return f"--{name[2:].replace('-', '_')}"


# ---- Spelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_options_may_have_underscores(parse, verb):
    given = parse(verb, *arguments(verb))
    assert given == parse(verb, *arguments(verb, with_underscores))
    for option in options(verb):
        if not option.is_flag:
            value = given[option.name]
            texts = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
            assert {text.removesuffix(".0") for text in texts} == {VALUE}, option.name


@pytest.mark.parametrize("verb", VERBS)
def test_several_values_follow_or_repeat_an_option(parse, verb):
    base = arguments(verb)
    for option in options(verb):
        if option.multiple:
            name = option.opts[0]
            following = parse(verb, *base, name, "4", "5")
            repeated = parse(verb, *base, name, "4", f"{name}=5")
            assert following == repeated
            assert [float(str(value)) for value in following[option.name]] == [3, 4, 5]


@pytest.mark.parametrize("verb", VERBS)
def test_flags_may_have_a_value(parse, verb):
    base = arguments(verb)
    for flag in options(verb):
        if flag.is_flag:
            on, off = flag.opts[0], flag.secondary_opts[0]
            assert off == f"--no-{on[2:]}"
            for given in ([on], [on, "true"], [f"{on}=True"], [off, "false"]):
                assert parse(verb, *base, *given)[flag.name] is True
            for given in ([off], [on, "false"], [f"{on}=no"], [with_underscores(off)]):
                assert parse(verb, *base, *given)[flag.name] is False


@pytest.mark.parametrize(
    ("given", "value"), [(["--weights", "-1", "-.5"], [-1, -0.5]), (["--weights=-1"], [-1]), ([], [])]
)
def test_negative_numbers_are_values(parse, given, value):
    recorded = parse("fuse", "--run", "a", "b", *given, "--output", "c")
    assert ([str(path) for path in recorded["run"]], list(recorded["weights"] or [])) == (["a", "b"], value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_json_and_helps_itself(parse, capsys, verb):
    assert "as_json" in {option.name for option in options(verb)}
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
        run_app(app, [*verb.split(), "--help"], "hf-kd-ranking")
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and shown.startswith(f"Usage: hf-kd-ranking {verb} ")
    assert "--config" in shown and "--json" in shown
    for option in options(verb):
        assert (option.help and option.help[0] == option.help[0].upper()) or option.help.startswith(("faiss", "cpu"))


@pytest.mark.parametrize("group", [[], ["teacher"]])
def test_a_group_without_a_verb_prints_its_help(capsys, group):
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
        run_app(app, group, "hf-kd-ranking")
    assert (exit_.value.code, "Commands:" in capsys.readouterr().out) == (0, True)


# ---- Option files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spell", [lambda name: name, with_underscores], ids=["dashes", "underscores"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_file_gives_every_option(parse, tmp_path, verb, spell):
    content, flags = {}, 0
    for parameter in VERBS[verb].params:
        if parameter.param_type_name == "argument":
            content[parameter.name] = int(VALUE)
        elif parameter.name == "config":
            continue
        elif parameter.is_flag:
            flags += 1
            content[spell(parameter.opts[0])[2:]] = flags % 2 == 1
        else:
            content[spell(parameter.opts[-1])[2:]] = [int(VALUE)] * parameter.nargs if parameter.nargs > 1 else VALUE
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(content))
    assert parse(verb, "--config", path) == parse(verb, *arguments(verb))


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_wins_over_the_file(parse, tmp_path, verb):
    path = tmp_path / "options.yaml"
    for option in options(verb):
        if option.is_flag or option.nargs > 1:
            continue
        path.write_text(f"{option.opts[0][2:]}: 4\n")
        assert parse(verb, "--config", path, *arguments(verb)) == parse(verb, *arguments(verb))
        path.write_text(f"{option.opts[0][2:]}: null\n")
        assert parse(verb, "--config", path, *arguments(verb)) == parse(verb, *arguments(verb))


def test_values_of_a_file_are_read_as_they_are_written(parse, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("run: [a, b=no]\noutput: 007.txt\nmethod: no\nweights: [7e-6, 1]\n")
    recorded = parse("fuse", "--config", path)
    assert ([str(run) for run in recorded["run"]], str(recorded["output"])) == (["a", "b=no"], "007.txt")
    assert (recorded["method"], list(recorded["weights"])) == ("no", [7e-6, 1.0])


# ---- Bad input ------------------------------------------------------------------------------------------------------


def error_line(monkeypatch, capsys, *given) -> str:
    monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *map(str, given)])
    with pytest.raises(SystemExit) as exit_:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_one_line(monkeypatch, capsys, tmp_path, verb):
    line = error_line(monkeypatch, capsys, *verb.split(), *arguments(verb), "--lerning_rate", "1")
    assert "No such option" in line and "--lerning-rate" in line and f"hf-kd-ranking {verb} --help" in line
    path = tmp_path / "options.yaml"
    path.write_text("lerning_rate: 1\na-b: 2\n")
    line = error_line(monkeypatch, capsys, *verb.split(), "--config", path)
    assert line == f"error: {path} has options that this verb does not have: a-b, lerning_rate."


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evalute", "No such command 'evalute'"),
        ("fuse --output x", "Missing option '--run'"),
        ("fuse --run a --output", "--output needs a value"),
        ("fuse --run --output x", "--run needs a value; one that begins with a dash is given as --run=VALUE."),
        ("fuse --run a --output --json", "--output needs a value"),
        ("teacher triples --candidates a --qrels b --output c --ranks 1", "'--ranks' requires 2 arguments"),
        ("fuse --run a --output x --k many", "Invalid value for '--k'"),
        ("fuse --run a --output x --k 0", "Invalid value for '--k'"),
        ("fuse --run a --output x y", "unexpected extra argument"),
        ("fuse --run a --output x --overwrite=maybe", "--overwrite is a flag: it takes true, false or nothing"),
        ("fuse --config nowhere.yaml", "The config file nowhere.yaml does not exist."),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, command, message):
    assert message in error_line(monkeypatch, capsys, *command.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- run", "must map options to values, got a list."),
        ("a: [", "is not valid YAML"),
        ("run: []", "run has an empty list"),
        ("output: [a, b]", "output takes one value, got a list."),
        ("k: many", "Invalid value for '--k'"),
        ("overwrite: maybe", "Invalid value for '--overwrite'"),
        ("config: other.yaml", "this verb does not have: config."),
        ("per_query: 1", "this verb does not have: per_query."),
    ],
)
def test_bad_files_are_one_line(monkeypatch, capsys, tmp_path, text, message):
    (tmp_path / "options.yaml").write_text(text)
    given = [] if "run" in text else ["--run", "a"]
    given += [] if "output" in text else ["--output", "b"]
    assert message in error_line(monkeypatch, capsys, "fuse", "--config", tmp_path / "options.yaml", *given)


def test_an_option_twice_in_a_file_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "options.yaml").write_text("model: a\nmodel_name: b\n")
    line = error_line(monkeypatch, capsys, "train", "--config", tmp_path / "options.yaml")
    assert "has model_name twice, under two of its names." in line


ERRORS = {
    "value": (InputError("two\n  lines"), 2, "error: two lines"),
    "key": (UnknownIdError("no 'quotes' around it"), 2, "error: no 'quotes' around it"),
    "long": (InputError("a" * 900 + "b" * 900), 2, f"error: {'a' * 500} ... {'b' * 500}"),
    "half a character": (InputError("'\ud83d'"), 2, "error: '\\ud83d'"),
    "file": (FileNotFoundError("x does not exist"), 2, "error: x does not exist"),
    "disk": (OSError("no space"), 1, "error: no space"),
    "loss": (FloatingPointError("the loss is NaN"), 1, "error: the loss is NaN"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted; the same command resumes here"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_an_exit_status(monkeypatch, capsys, name):
    error, status, line = ERRORS[name]

    def fail() -> None:
        raise error

    failing = make_app()
    add_verb(failing, fail)
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
        run_app(failing, [], "fail")
    assert (exit_.value.code, capsys.readouterr().err) == (status, f"{line}\n")
    monkeypatch.setitem(os.environ, "HF_KD_RANKING_TRACEBACK", "1")
    if status < 100:
        with pytest.raises(type(error)), exit_on_bad_input():
            run_app(failing, [], "fail")


@pytest.mark.parametrize("error", [ValueError("of a library"), KeyError("a fault"), TypeError("a fault")])
def test_a_fault_keeps_its_traceback(error):
    def fail() -> None:
        raise error

    failing = make_app()
    add_verb(failing, fail)
    with pytest.raises(type(error)), exit_on_bad_input():
        run_app(failing, [], "fail")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_bad_input():
        raise ZeroDivisionError


@pytest.mark.parametrize(("text", "shown"), [(None, "rows 1,000, name x"), ("a\nb", "a\nb")])
def test_results_are_printed_for_people_and_programs(capsys, text, shown):
    result = {"rows": 1_000, "name": "x"}

    def show() -> tuple[dict, str] | dict:
        return result if text is None else (result, text)

    showing = make_app()
    add_verb(showing, show)
    run_app(showing, [], "show")
    assert capsys.readouterr().out == f"{shown}\n"
    run_app(showing, ["--json"], "show")
    assert json.loads(capsys.readouterr().out) == result
