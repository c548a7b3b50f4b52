"""Files that ottfx writes and reads: compiled models with their packed state, and saved caches."""
