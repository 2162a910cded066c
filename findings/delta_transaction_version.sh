#!/usr/bin/env bash
# deltalake 1.6.6: of a table object's writes one, create_write_transaction, leaves the object at its old version.
#
# Guess, before looking: the object that commits files sees them, as after write_deltalake, delete, merge and compact.
# Seen: these four move the object to the version that they made. After create_write_transaction version() is the one
# before, and file_uris() lacks the files just committed, while a second open of the same folder has both. The next
# commit through the stale object succeeds, because appends do not conflict. Who commits Parquet files of its own and
# then plans by the same object misses them: call update_incremental() after each.
#
# Output seen:
#   write_deltalake: object 1, folder 1
#   create_write_transaction: object 1, folder 2; files 2 and 3
#   a second one through it: object 1, folder 3; files 2 and 4
#   update_incremental: object 3, folder 3
#   delete: object 4, folder 4
#   merge: object 5, folder 5
#   compact: object 6, folder 6
#
# Fails if that changes. Needs Linux and Python 3.11 to 3.13; 80 MB and half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check deltalake==1.6.6 pyarrow==26.0.1 2>/dev/null

cat > writes.py <<'PYTHON'
import os

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake
from deltalake.transaction import AddAction


def show(what, with_files=False):
    fresh = DeltaTable("table")
    files = f"; files {len(table.file_uris())} and {len(fresh.file_uris())}" if with_files else ""
    print(f"{what}: object {table.version()}, folder {fresh.version()}{files}")


def commit(name, number):
    path = f"table/{name}"
    pq.write_table(pa.table({"x": [number]}), path)
    add = AddAction(name, os.path.getsize(path), {}, 0, True, '{"numRecords": 1}')
    table.create_write_transaction([add], "append", table.schema(), [])


write_deltalake("table", pa.table({"x": [0, 1]}))
table = DeltaTable("table")
write_deltalake(table, pa.table({"x": [2]}), mode="append")
show("write_deltalake")
commit("three.parquet", 3)
show("create_write_transaction", with_files=True)
commit("four.parquet", 4)
show("a second one through it", with_files=True)
table.update_incremental()
show("update_incremental")
table.delete("x = 0")
show("delete")
matched = table.merge(pa.table({"x": [1]}), "new.x = old.x", source_alias="new", target_alias="old")
matched.when_matched_delete().execute()
show("merge")
table.optimize.compact()
show("compact")
PYTHON
venv/bin/python writes.py | tee output
grep -qx 'write_deltalake: object 1, folder 1' output
grep -qx 'create_write_transaction: object 1, folder 2; files 2 and 3' output
grep -qx 'a second one through it: object 1, folder 3; files 2 and 4' output
grep -qx 'update_incremental: object 3, folder 3' output
grep -qx 'delete: object 4, folder 4' output
grep -qx 'merge: object 5, folder 5' output
grep -qx 'compact: object 6, folder 6' output
