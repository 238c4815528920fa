"""When and how much to grow: the laws behind `advise_growth`, and its answer."""
