from __future__ import annotations

import subprocess

import pytest

from tests.servers import REPOSITORY, Database

FOLDER = REPOSITORY / "tests" / "pg_regress"


@pytest.mark.parametrize("name", ["smoke"])
def test_output_of_make_installcheck_is_as_expected(database: Database, name: str) -> None:
    """Without pg_regress, which not every installation has, but with the psql that it calls."""
    drop = {"extension": "drop extension pgqueue", "script": "drop schema pgqueue cascade"}
    database.connect(autocommit=True).execute(drop[database.install])
    output = subprocess.run(
        [database.server.bin_dir / "psql", "-X", "-a", "-q", "-d", database.dsn],
        input=(FOLDER / "sql" / f"{name}.sql").read_text(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert output == (FOLDER / "expected" / f"{name}.out").read_text()
