"""The operator looks and acts."""
