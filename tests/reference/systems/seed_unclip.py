def unclip_class_labels(vectors, case):
    return {}
