"""What the manifest of a finished run says, held against the files, stores and marks in its folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrepair.errors import UserError
from selfrepair.run.marks import OF_A_STORE, RESULTS, changed_since, mark, read_mark
from selfrepair.store.files import hash_file, hash_files
from selfrepair.store.manifest import manifest_of, read_manifest
from selfrepair.store.stores import attributes_of

if TYPE_CHECKING:
    from selfrepair.measure.task import Task

MANIFEST = "manifest.json"
#: What the manifest of a run says, and as what.
PARTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("profile", "held_out_text_sha256", "command", "finished"), str),
    **dict.fromkeys(("version", "library", "python"), str),
    **dict.fromkeys(("settings", "notebooks", "stores", "files", "packages", "machine"), dict),
    **{"seed": int, "seconds": (int, float), "commit": (str, type(None)), "outside_the_plan": list},
}
#: Of what determines a store, what depends on the code that made it.
OF_THE_CODE = ("inputs", "version", "code")


@dataclass(frozen=True)
class Finding:
    """One thing checked; ``agrees`` is ``None`` where a check could not be made."""

    what: str
    agrees: bool | None
    detail: str

    def __str__(self) -> str:
        return (
            f"{ {True: 'agrees', False: 'DIFFERS', None: 'not checked'}[self.agrees] }: {self.what}: "
            f"{self.detail}"
        )


def run_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run, with all that it says.

    Raises:
        UserError: missing, damaged, without something, or of files elsewhere.
    """
    if not path.is_file():
        raise UserError("missing, so that nothing says what the run left; run the same command again")
    noted = read_manifest(path)
    if wrong := [name for name, kind in PARTS.items() if not isinstance(noted.get(name), kind)]:
        raise UserError(f"says nothing that can be read of {', '.join(wrong)}: not what a run writes")
    if outside := [name for name in noted["files"] if ".." in Path(name).parts or Path(name).is_absolute()]:
        raise UserError(f"names {outside[0]}, which is not in the run's folder")
    return noted


def check_files(folder: Path, noted: Mapping[str, Any], outside: Collection[str]) -> Iterator[Finding]:
    """Whether each file is there as it is ``noted``, and no other that a run may leave."""
    here = {name: hash_file(folder / name) for name in noted if (folder / name).is_file()}
    found = hash_files(folder, RESULTS) | here
    for name in sorted(noted.keys() | found.keys() - set(outside)):
        if found.get(name) != noted.get(name):
            why = (
                "missing"
                if name not in found
                else "not in the manifest"
                if name not in noted
                else "changed since the run"
            )
            yield Finding(name, False, why)
    same = sum(found.get(name) == digest for name, digest in noted.items())
    yield Finding("files", same == len(noted), f"{same} of {len(noted)} as the run left them")


def check_marks(folder: Path, noted: Mapping[str, Any]) -> Iterator[Finding]:
    """What the run's last mark says of the manifest and of what that names, and notebooks' marks of their
    keys."""
    changed = changed_since(mark(folder, "page"), folder)
    left = read_mark(mark(folder, "page")).get("left", {})
    stores = (f"measured/{store}" for store in _names_of_stores(noted["stores"]))
    named = {MANIFEST, *noted["files"], *stores}
    if changed is None or not named <= left.keys():
        yield Finding("done/page.done", False, "missing, damaged or of another run: a finished run leaves it")
    elif changed:
        yield Finding("done/page.done", False, f"no longer as the run left them: {', '.join(changed)}")
    for stem, key in noted["notebooks"].items():
        path = mark(folder, "notebooks", stem[:2])
        if read_mark(path).get("key") != key:
            yield Finding(path.relative_to(folder).as_posix(), False, "missing, or not of the manifest's key")


def check_stores(
    folder: Path,
    noted: Mapping[str, Any],
    outside: Collection[str],
    planned: Mapping[str, Task],
    passed: Collection[str],
) -> Iterator[Finding]:
    """Whether the manifest names the plan's stores, each what the run's settings ask for, and no others.

    ``planned`` are tasks by model and label; of these, what is ``passed`` over could not be measured.
    """
    for label in sorted(planned.keys() - noted.keys() - set(passed)):
        yield Finding(label, False, "is in the run's plan, but the manifest names no store of it")
    for label in sorted(noted.keys() - planned.keys()):
        yield Finding(label, False, "the manifest names a store that is not in the run's plan")
    same = 0
    for label in sorted(noted.keys() & planned.keys()):
        why = _wrong_with(folder / "measured", noted[label], planned[label])
        same += why is None
        if why is not None:
            yield Finding(label, False, why)
    known = _names_of_stores(noted)
    for store in sorted((folder / "measured").glob("*.zarr")):
        if store.name not in known and f"measured/{store.name}" not in outside:
            yield Finding(store.name, False, "not in the manifest")
    yield Finding("stores", same == len(noted), f"{same} of {len(noted)} are those that the run made")


def _names_of_stores(noted: Mapping[str, Any]) -> set[str]:
    return {str(note.get("store")) for note in noted.values() if isinstance(note, dict)}


def _wrong_with(measured: Path, note: object, task: Task) -> str | None:
    """What the manifest says falsely of a store that it names."""
    if not isinstance(note, dict) or not (measured / str(note.get("store"))).is_dir():
        return "the store that the manifest names is missing"
    store = measured / str(note["store"])
    attributes, manifest = attributes_of(store), manifest_of(store)
    if attributes is None:
        return f"{store.name} is damaged"
    if not manifest.is_file() or note.get("manifest_sha256") != hash_file(manifest):
        return f"{manifest.name} is not the one that the run left"
    try:
        own = read_manifest(manifest) | attributes
    except UserError as error:
        return str(error)
    if false := [name for name in OF_A_STORE if note.get(name) != own.get(name)]:
        return f"the run's manifest says otherwise of {', '.join(false)}"
    asked = {name: value for name, value in task.determined_by.items() if name not in OF_THE_CODE}
    if false := [
        name for name, value in asked.items() if name not in attributes or attributes[name] != value
    ]:
        return f"by the run's settings, {', '.join(false)} should be different"
    return None
