"""The growth-factor study, in parts: what is run (`settings`, `jobs`), running it (`text`, `running`, `workers`), what it says
(`table`, `claims`, `calibration`) and how that is shown (`document`, `plots`). `benchmarks.growth_factor` is its command."""
