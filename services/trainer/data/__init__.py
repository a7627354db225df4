"""What a run trains on: conversations about the document, written once into a data set of the store."""
