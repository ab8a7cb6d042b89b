"""The rollout: configuration, model, sampler, history plan, attention over history, media in and out."""
