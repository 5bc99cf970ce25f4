"""agent/offer: a small model is offered what makes sense now, read off the task and the work so far."""

from mycoswarmd.agent.offer import Progress, find_names, offer_tools

TOOLS = ("fs_read", "fs_write", "fs_edit", "fs_list", "fs_search", "run")
FILES = ["a.txt", "b.txt", "src/main.py"]


def offered(progress: Progress, tools: tuple[str, ...] = TOOLS) -> dict[str, dict[str, dict[str, object]]]:
    found = {}
    for one in offer_tools(tools, progress, is_guided=True):
        function = one["function"]
        assert isinstance(function, dict)
        found[function["name"]] = function["parameters"]["properties"]
    return found


def progress(task: str, files: list[str] | None = None) -> Progress:
    files = list(FILES) if files is None else files
    return Progress(files=files, named=find_names(task, files))


def test_names_are_found_in_the_task() -> None:
    assert find_names("Read a.txt, then write out/sum.md.", FILES) == ("a.txt", "out/sum.md")
    assert find_names("Look at (src/main.py) and Makefile", [*FILES, "Makefile"]) == (
        "src/main.py",
        "Makefile",
    )
    assert find_names("Say hello.", FILES) == ()


def test_without_names_all_files_can_be_read_once() -> None:
    work = progress("Summarise the files")
    assert offered(work)["fs_read"]["path"]["enum"] == FILES
    assert "fs_write" not in offered(work)
    work.note("fs_read", "a.txt", has_changed=False)
    assert offered(work)["fs_read"]["path"]["enum"] == ["b.txt", "src/main.py"]
    assert "enum" not in offered(work)["fs_write"]["path"]


def test_named_files_come_first_and_writing_goes_to_what_is_named() -> None:
    work = progress("Read b.txt and a.txt and write c.md")
    assert offered(work)["fs_read"]["path"]["enum"] == ["a.txt", "b.txt"]
    work.note("fs_read", "a.txt", has_changed=False)
    assert "fs_write" not in offered(work)
    work.note("fs_read", "b.txt", has_changed=False)
    assert "fs_read" not in offered(work)
    assert offered(work)["fs_write"]["path"]["enum"] == ["c.md"]
    work.note("fs_write", "c.md", has_changed=True)
    assert offered(work).keys() == {"run", "finish"}


def test_an_empty_workspace_can_be_written_at_once() -> None:
    assert offered(progress("Write a poem to poem.txt", []))["fs_write"]["path"]["enum"] == ["poem.txt"]


def test_a_named_file_that_is_to_be_changed_can_be_edited_after_it_was_read() -> None:
    work = progress("Fix the typo in a.txt")
    assert "fs_edit" not in offered(work)
    work.note("fs_read", "a.txt", has_changed=False)
    assert offered(work)["fs_edit"]["path"]["enum"] == ["a.txt"]


def test_only_the_agents_own_tools_and_finish_are_offered() -> None:
    assert offered(progress("x"), ("fs_read",)).keys() == {"fs_read", "finish"}
    assert offered(progress("x"), ("finish", "unknown")).keys() == {"finish"}


def test_everything_a_small_model_may_write_is_bounded() -> None:
    work = progress("Read a.txt")
    work.note("fs_read", "a.txt", has_changed=False)
    for name, properties in offered(work).items():
        for schema in properties.values():
            if name != "run" and schema["type"] == "string":
                assert "enum" in schema or "maxLength" in schema


def test_choices_are_bounded() -> None:
    many = progress("Look", [f"f{number}" for number in range(1000)])
    choices = offered(many)["fs_read"]["path"]["enum"]
    assert isinstance(choices, list)
    assert len(choices) == 64


def test_a_model_with_tools_of_its_own_gets_all_with_their_schemas() -> None:
    tools = offer_tools(TOOLS, progress("Read a.txt"), is_guided=False)
    assert len(tools) == len(TOOLS) + 1
    function = tools[0]["function"]
    assert isinstance(function, dict)
    assert "enum" not in function["parameters"]["properties"]["path"]
