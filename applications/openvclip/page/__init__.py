"""A live page: a video, labels in words, and the anchor weight under one's hand."""
