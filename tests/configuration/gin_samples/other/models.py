import dataclasses


@dataclasses.dataclass(frozen=True)
class Teacher:
    temperature: float = 1.0
