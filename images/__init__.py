"""What build.py does, a file a subject. Standard library only: this code runs before anything is installed."""
