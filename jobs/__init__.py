"""What a studio needs around the rollout: film specification, command line, gangs, status."""
