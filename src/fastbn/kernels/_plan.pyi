OPERATIONS: dict[str, int]
BENDS: dict[str, int]

class Plan:
    outer: int
    channels: int
    inner: int
    wide: bool
    pattern: int
    def __new__(
        cls,
        shape: tuple[int, int, int],
        wide: bool,
        u: tuple[int, int, int],
        v: tuple[int, int, int] | None = None,
        y: tuple[int, int, int] | None = None,
        w: tuple[int, int, int] | None = None,
    ) -> Plan: ...
