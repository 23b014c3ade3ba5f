"""Row changes under faults: everybody is told exactly what the ledger says, or of a gap, and nobody what is hidden."""

from __future__ import annotations

from tests.fix_row_oracle import RowOracleFactory, RowSize, ServerOfRows


async def test_everybody_is_told_what_the_ledger_says(
    row_server: ServerOfRows, row_oracle_of: RowOracleFactory, row_size: RowSize
) -> None:
    oracle = row_oracle_of(await row_server())
    oracle.add_crowd()
    await oracle.confirmed()
    told = 0
    for _ in range(row_size.phases):
        await oracle.write()
        told += await oracle.verdict()
        await oracle.change_everything()
    assert told > 100 * row_size.phases
