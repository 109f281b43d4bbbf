package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Tokens count on both listeners; what clients send to backends is no attempt on the API, and tells nobody of services.
func TestTokens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	err := os.WriteFile(path, []byte(`
- {name: users, token: users-0123456789abcdef, register: [users]}
- {name: board, token: board-0123456789abcdef, read: true}
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	g := launch(t, nil, "--tokens", path, "--access-log", "stdout")
	bearer := func(name string) string { return "Authorization: Bearer " + name + "-0123456789abcdef\r\n" }
	ask := func(addr, line, name, body string) (int, string) {
		t.Helper()
		response, text := exchange(t, addr, strings.Replace(post(body, bearer(name)), "POST /register", line, 1))
		return response.StatusCode, text
	}
	for listener, addr := range map[string]string{"data": g.data, "admin": g.admin} {
		for _, row := range []struct {
			line, name, body string
			status           int
		}{
			{"POST /register", "users", fmt.Sprintf(`{"service":"users","id":%q,"addr":"http://127.0.0.1:1"}`, listener), 204},
			{"POST /register", "users", `{"service":"orders","id":"a","addr":"http://127.0.0.1:1"}`, 403},
			{"POST /register", "board", `{"service":"users","id":"b","addr":"http://127.0.0.1:1"}`, 403},
			{"GET /services/users", "board", "", 200},
			{"GET /services/users", "nobody", "", 401},
		} {
			if status, text := ask(addr, row.line, row.name, row.body); status != row.status {
				t.Errorf("%s: %s by %s: %d %s", listener, row.line, row.name, status, text)
			}
		}
		eventually(t, "the log tells of the change", func() bool {
			return g.logged("registration changed", `"action":"register"`, `"instance":"users/`+listener+`"`, `"by":"token users"`)
		})
	}
	refused := func() int { return strings.Count(g.stderr.String(), "API call refused") }
	eventually(t, "the log tells of those refused", func() bool { return refused() == 6 })
	for name, tells := range map[string]bool{"board": true, "users": false, "nobody": false} {
		for range 20 {
			if status, text := ask(g.data, "GET /", name, ""); status != 404 || strings.Contains(text, "/users") != tells {
				t.Errorf("a path of no service, asked by %s: %d %s", name, status, text)
			}
		}
	}
	if status, text := ask(g.data, "GET /services", "nobody", ""); status != 401 {
		t.Errorf("a first attempt: %d %s", status, text)
	}
	eventually(t, "the log tells of that one", func() bool { return refused() > 6 })
	if n := refused(); n != 7 {
		t.Errorf("%d lines tell of calls that were refused", n)
	}
	if strings.Contains(g.stderr.String()+g.stdout.String(), "0123456789abcdef") {
		t.Error("a token is in the log")
	}
}
