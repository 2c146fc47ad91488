"""From photographs to records: ``fact-train data``.

``build`` runs three phases of independent pieces of work, whose results are files: photos in chunks
(``chunk``), blocks of pairs (``pairs``), shards of records (``product``). Between them one process
decides (``decide``). A piece that is there already is not done again, and none depends on which
process does it, so a build that was killed goes on, and any number of processes writes the same.
"""
