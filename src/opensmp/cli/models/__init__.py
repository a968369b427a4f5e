"""The models that commands load: their files, factories and inputs."""
