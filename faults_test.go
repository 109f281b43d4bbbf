package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// A clock that is set must not end a request or keep it: times are compared by their monotonic part, which every time.Now
// has. What drops it may only be for people to read. No test can set the clock of the machine, so this looks at the code.
func TestTimesAreMonotonic(t *testing.T) {
	drops := map[string]bool{} // methods that give a time without it, or a number; and functions of package time
	for _, name := range strings.Fields("Unix UnixNano UnixMilli UnixMicro UTC Local In AddDate") {
		drops[name] = true
	}
	forPeople := map[string]bool{"proxy/answer.go appendDate": true, "registry/http.go seconds": true}
	looked := 0
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if entry.IsDir() && (entry.Name() == "bench" || entry.Name() == "testdata") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		looked++
		for _, declaration := range file.Decls {
			within := filepath.ToSlash(path)
			if f, ok := declaration.(*ast.FuncDecl); ok {
				within += " " + f.Name.Name
			}
			ast.Inspect(declaration, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				method, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || !drops[method.Sel.Name] || forPeople[within] || alwaysPast(call, method) {
					return true
				}
				if on, ok := method.X.(*ast.Ident); ok && on.Name != "time" && importedAs(file, on.Name) {
					return true // another package's
				}
				t.Errorf("%s: %s drops the monotonic part of a time", files.Position(call.Pos()), method.Sel.Name)
				return true
			})
		}
		return nil
	})
	if err != nil || looked < 30 {
		t.Errorf("looked at %d files, %v", looked, err)
	}
}

// alwaysPast says that a call is time.Unix(1, 0): a deadline that has passed whatever the clock says.
func alwaysPast(call *ast.CallExpr, method *ast.SelectorExpr) bool {
	if method.Sel.Name != "Unix" || len(call.Args) != 2 {
		return false
	}
	seconds, ok := call.Args[0].(*ast.BasicLit)
	return ok && seconds.Value == "1"
}

func importedAs(file *ast.File, name string) bool {
	for _, i := range file.Imports {
		path := strings.Trim(i.Path.Value, `"`)
		if i.Name != nil && i.Name.Name == name || i.Name == nil && path[strings.LastIndexByte(path, '/')+1:] == name {
			return true
		}
	}
	return false
}
