"""
The tables of the index, and the migrations from earlier versions. Pure.

Migrations only add: an older daemon may have the same database open.
"""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE content (
        digest BLOB PRIMARY KEY, size INTEGER NOT NULL, blocks INTEGER NOT NULL, used INTEGER NOT NULL, verified INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX content_by_use ON content (used);
    CREATE TABLE arriving (
        name TEXT PRIMARY KEY, token TEXT NOT NULL, blocks INTEGER NOT NULL, written INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE repository (
        id INTEGER PRIMARY KEY, registry TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (registry, name)
    );
    CREATE TABLE holds (
        repository INTEGER NOT NULL, digest BLOB NOT NULL, kind INTEGER NOT NULL, variant TEXT NOT NULL,
        media_type TEXT, size INTEGER NOT NULL, manifest BLOB, confirmed INTEGER NOT NULL,
        PRIMARY KEY (repository, digest, kind, variant)
    ) WITHOUT ROWID;
    CREATE TABLE tag (
        repository INTEGER NOT NULL, tag TEXT NOT NULL, variant TEXT NOT NULL, accepts TEXT NOT NULL,
        digest BLOB NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL, confirmed INTEGER NOT NULL,
        PRIMARY KEY (repository, tag, variant, accepts)
    ) WITHOUT ROWID;
    CREATE TABLE tag_move (
        id INTEGER PRIMARY KEY, repository INTEGER NOT NULL, tag TEXT NOT NULL, from_digest BLOB NOT NULL,
        to_digest BLOB NOT NULL, seen INTEGER NOT NULL
    );
    CREATE INDEX tag_move_by_tag ON tag_move (repository, tag);
    -- A move that another row of the tag, one of other types, has shown since this one was confirmed is the same.
    CREATE TRIGGER tag_moved AFTER UPDATE OF digest ON tag WHEN old.digest <> new.digest AND NOT EXISTS (
        SELECT 1 FROM tag_move WHERE repository = new.repository AND tag = new.tag
            AND from_digest = old.digest AND to_digest = new.digest AND seen > old.confirmed
    ) BEGIN
        INSERT INTO tag_move (repository, tag, from_digest, to_digest, seen)
            VALUES (new.repository, new.tag, old.digest, new.digest, new.confirmed);
        DELETE FROM tag_move WHERE repository = new.repository AND tag = new.tag AND id <= (
            SELECT id FROM tag_move WHERE repository = new.repository AND tag = new.tag
                ORDER BY id DESC LIMIT 1 OFFSET 100);  -- it does not drive out the moves of others
        DELETE FROM tag_move WHERE id <= (SELECT id FROM tag_move ORDER BY id DESC LIMIT 1 OFFSET 10000);
    END;
    CREATE TABLE purge (generation INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL);
    CREATE TABLE total (
        id INTEGER PRIMARY KEY, files INTEGER NOT NULL, blocks INTEGER NOT NULL, arriving INTEGER NOT NULL,
        compared INTEGER NOT NULL
    );
    INSERT INTO total (id, files, blocks, arriving, compared) VALUES (0, 0, 0, 0, 0);
    CREATE TRIGGER content_in AFTER INSERT ON content BEGIN
        UPDATE total SET files = files + 1, blocks = blocks + new.blocks; END;
    CREATE TRIGGER content_out AFTER DELETE ON content BEGIN
        UPDATE total SET files = files - 1, blocks = blocks - old.blocks; END;
    CREATE TRIGGER content_resized AFTER UPDATE OF blocks ON content WHEN old.blocks <> new.blocks BEGIN
        UPDATE total SET blocks = blocks - old.blocks + new.blocks; END;
    CREATE TRIGGER arriving_in AFTER INSERT ON arriving BEGIN
        UPDATE total SET arriving = arriving + new.blocks; END;
    CREATE TRIGGER arriving_out AFTER DELETE ON arriving BEGIN
        UPDATE total SET arriving = arriving - old.blocks; END;
    CREATE TRIGGER arriving_resized AFTER UPDATE OF blocks ON arriving WHEN old.blocks <> new.blocks BEGIN
        UPDATE total SET arriving = arriving - old.blocks + new.blocks; END;
    """,
)
"""The script that brings a database from each version (PRAGMA user_version) to the next."""
LAYOUT: Final = 1
"""Part of the file's name. Raised by a change that is incompatible with older daemons, which makes another file."""
STATE: Final = (
    "SELECT files, blocks, arriving, (SELECT min(used) FROM content), compared,"
    " coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'purge'), 0) FROM total WHERE id = 0"
)
