"""What a run reads: models on disk, prompts from files, hubs and generators, chat templates."""
