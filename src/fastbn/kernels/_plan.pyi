OPERATIONS: dict[str, int]
BENDS: dict[str, int]
KINDS: dict[str, int]

class Plan:
    outer: int
    channels: int
    inner: int
    kind: int
    wide: bool
    pattern: int
    def __new__(
        cls,
        shape: tuple[int, int, int],
        kind: int,
        u: tuple[int, int, int],
        v: tuple[int, int, int] | None = None,
        y: tuple[int, int, int] | None = None,
        w: tuple[int, int, int] | None = None,
        kept: tuple[int, int, int] | None = None,
    ) -> Plan: ...
    def work(self, operation: int) -> int: ...
