"""Growth of models: spaces, maps, layouts, plans. Pure: no trainer, no Hub, no disk, no plotting."""
