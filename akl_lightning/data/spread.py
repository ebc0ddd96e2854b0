"""Few samples out of many, evenly."""


def spread(index: int, places: int, wanted: int) -> int:
    """Of so many things that are spread evenly over some places, how many fall to the one with this index.

    >>> [spread(index, 10, 3) for index in range(10)], spread(0, 1, 3)
    ([0, 1, 0, 0, 1, 0, 0, 0, 1, 0], 3)
    """
    return (2 * (index + 1) * wanted + places) // (2 * places) - (2 * index * wanted + places) // (2 * places)
