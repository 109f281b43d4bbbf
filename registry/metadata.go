package registry

import (
	"fmt"
	"maps"
	"net/http"
	"unicode"
	"unicode/utf8"
)

// The bounds of metadata: what people write about an instance, and no database. The gateway only keeps and shows it.
const (
	maxMetadata      = 64  // pairs that an instance registers, and as many over them
	maxMetadataValue = 512 // bytes; a key is a name
)

// checkMetadata refuses metadata out of bounds; the error is a *FieldError.
func checkMetadata(pairs map[string]string) error {
	if len(pairs) > maxMetadata {
		return &FieldError{"metadata", fmt.Sprintf("has %d pairs, and must have at most %d", len(pairs), maxMetadata)}
	}
	for key, value := range pairs {
		if err := ValidName(key); err != nil {
			return &FieldError{"metadata", fmt.Sprintf("the key %s %v", clip(key), err)}
		}
		if len(value) > maxMetadataValue {
			return &FieldError{"metadata", fmt.Sprintf("%s has %d bytes, and must have at most %d", key, len(value), maxMetadataValue)}
		}
		if !utf8.ValidString(value) {
			return &FieldError{"metadata", key + " must be UTF-8"}
		}
		for _, c := range value {
			if unicode.IsControl(c) {
				return &FieldError{"metadata", fmt.Sprintf("%s has the control character %U", key, c)}
			}
		}
	}
	return nil
}

// merge returns pairs with others over them, or nil if there are none. It changes neither.
func merge(pairs, over map[string]string) map[string]string {
	if len(pairs)+len(over) == 0 {
		return nil
	}
	merged := make(map[string]string, len(pairs)+len(over))
	maps.Copy(merged, pairs)
	maps.Copy(merged, over)
	return merged
}

// patchMetadata returns what is over an instance's own metadata after a change of it: nil takes a pair away.
func patchMetadata(over map[string]string, changes map[string]*string) map[string]string {
	next := merge(over, nil)
	for key, value := range changes {
		if value == nil {
			delete(next, key)
			continue
		}
		if next == nil {
			next = map[string]string{}
		}
		next[key] = *value
	}
	if len(next) == 0 {
		return nil
	}
	return next
}

// readMetadata reads the object behind the member metadata, whose brace was read; nil stands for null, where that may be.
func readMetadata(s *scanner, nullable bool) (map[string]*string, error) {
	pairs := map[string]*string{}
	for t := s.next(); t.kind != '}'; t = s.next() {
		key := string(t.text)
		if _, twice := pairs[key]; twice {
			return nil, &refusal{http.StatusBadRequest, "metadata", fmt.Sprintf("metadata: %s is there twice", clip(key))}
		}
		switch value := s.next(); {
		case value.kind == '"':
			text := string(value.text)
			pairs[key] = &text
		case value.kind == 'n' && nullable:
			pairs[key] = nil
		default:
			return nil, &refusal{http.StatusBadRequest, "metadata", fmt.Sprintf("metadata: %s must be a string, not %s", clip(key), value.describe())}
		}
	}
	return pairs, nil
}

// texts is those pairs that are not null.
func texts(pairs map[string]*string) map[string]string {
	if len(pairs) == 0 {
		return nil
	}
	all := make(map[string]string, len(pairs))
	for key, value := range pairs {
		if value != nil {
			all[key] = *value
		}
	}
	return all
}
